"""The audit: what each output of a model really depends on, seen from outside, beside what its mask promises."""
