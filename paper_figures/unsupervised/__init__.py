"""T. Morrill, *Unsupervised Representation Learning with Predictive Coding*: latents of digits."""
