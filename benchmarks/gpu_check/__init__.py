"""The check of one GPU that launch/gpu_check.sh runs, in two calls of a few minutes.

call.py         a call: its budget, its parts, the file of results that each part adds to
card.py         the accelerator's name and the bandwidth of its memory, measured
children.py     processes beside the call's own, which a part can end in time
correctness.py  call 1: starts the three below, and reads what they found
errors.py       call 1: operations and a training step against float64, in every precision
forms.py        call 1: the project's own tests, with the forms of operations that they compare
bits.py         call 1: stop, resume, equal bits
speed.py        call 1: images/s of the training step, beside plain Flax and PyTorch
torch_side.py   call 1: PyTorch, in a process of its own
profile.py      call 1: where the time of a step goes, by kind of kernel
fed.py          call 1: the step fed from JPEG files
science.py      call 2: BN against the same network without it, on natural images
small.py        the network of smoke runs and of bits.py
pack.py         before: wheels and pictures for a machine without a network
"""
