"""The kernel suite: LoRA linears and decoder layers in every implementation, checked, timed and counted.

`suite` says what is measured, `implementations` builds it, `timing` times it, `measure` makes the result files,
`verify` compares with float64, and `traffic` reads the GPU's memory counters.
"""
