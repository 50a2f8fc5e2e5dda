"""Run ``steerlm`` as ``python -m steerlm_megatron``."""

from steerlm_megatron.cli import main

if __name__ == "__main__":
    main()
