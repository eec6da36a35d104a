from mutor_vision.cli import main

main()
