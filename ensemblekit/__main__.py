"""`python -m ensemblekit`, for places where the script is not on the path."""

from ensemblekit.cli.main import main

if __name__ == "__main__":
    main()
