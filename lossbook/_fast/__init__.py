"""The same values and gradients as the formulas, in fewer passes or less memory, for plain eager tensors.

One file a chapter. A fast road is a pair of functions: ``value(s, *constants)`` returns the loss of each row and what
its gradient needs, ``slope(gradient_of_loss, kept, spare)`` returns the gradient of the scores. :func:`fused` joins
them to the formula, which takes over for every second derivative.
"""

from lossbook._fast._function import Kept, fused

__all__ = ["Kept", "fused"]
