"""The tap on diffusers' models, through torch's fused attention."""
