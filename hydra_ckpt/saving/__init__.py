"""One save, from live tensors to a published checkpoint.

In the order in which a save meets them: `request` (what was asked for), `agreement` (what all ranks hold together),
`planning` and `contents` (what each rank writes), `drift` (whether replicas hold the same), `staged` (the tensors
between the threads), `transaction` (all ranks or none), `save` and `exporting` (the two transactions there are),
`pending` (what the caller holds). `saver` puts them together.
"""
