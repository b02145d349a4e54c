"""`python -m benchmarks.weights`."""

from benchmarks.weights.recipe import main

if __name__ == "__main__":
    main()
