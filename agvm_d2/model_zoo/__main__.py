"""`python -m agvm_d2.model_zoo`: the names of all configs."""

from . import main

if __name__ == "__main__":
    main()
