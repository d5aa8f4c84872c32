"""The residual stream taken apart: who wrote it, who built an attention score, which key moves a
logit."""
