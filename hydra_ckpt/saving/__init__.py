"""One save, from live tensors to a published checkpoint.

In the order a save uses them: `request` (the arguments of `save`), `agreement` (what all ranks hold together),
`planning` and `contents` (what each rank writes), `drift` (whether replicas hold the same), `staged` (the tensors
shared by the two threads), `transaction` (all ranks or none), `save` and `exporting` (the two transactions),
`pending` (the handle returned to the caller). `saver` puts them together.
"""
