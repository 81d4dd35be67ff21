"""`python -m saev_dist`, which torchrun can start, is the `saev-dist` program."""

from saev_dist.cli import main

if __name__ == "__main__":
    main()
