"""``python -m steerlm_megatron`` is ``steerlm``."""

from steerlm_megatron.cli import main

if __name__ == "__main__":
    main()
