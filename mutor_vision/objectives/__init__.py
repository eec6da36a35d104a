"""What is learnt: the sequence of one batch, registers, parallel heads, and their cross-entropies."""
