"""Convert corpora in their published formats into conversation records. Depends on ``steerlm_megatron.steer`` alone."""
