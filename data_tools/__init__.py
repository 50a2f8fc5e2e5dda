"""Corpora in their published formats → conversation records. Stands on ``steerlm_megatron.steer`` alone."""
