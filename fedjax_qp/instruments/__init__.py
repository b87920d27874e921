"""Instruments: what a checkpoint's loss looks like around it, and how its clients agree.

One idea a file, each with `measure` (numbers that JSON can hold), `headline` (the few that go into a table) and `draw` (the
figure). `inspection` ties them together; `settings` holds every default.

All of them look at the *global* model in evaluation mode: batch-norm statistics stay those of the checkpoint, whatever the
weights are moved to, and dropout, where a model has any, is off. Loss, gradient and Hessian are means over one fixed sample
of the clients' training examples, so two methods with the same data are measured on the same examples. The loss is that of
tests: of `char_lstm`, also where it predicts every character in training, the one after a window.
"""
