"""`python -m rlsd.pipeline` is `rlsd`, for launchers that start modules, as torchrun -m does."""

from rlsd.pipeline.cli import main

if __name__ == "__main__":
    main()
