"""The VQ tokenizer: images -> codes -> images. model, quantizer, losses, reconstruction (scores), train, encode."""
