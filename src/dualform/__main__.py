"""``python -m dualform``: the command line, also where its script is not on the path."""

from dualform.cli.main import main

if __name__ == "__main__":
    main()
