"""The reading of arguments that all losses share."""

import pytest
import torch

from lossbook._common import check_index_target


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_index_targets_of_a_small_dtype_do_not_wrap(dtype):
    """In uint8, -100 is 156 and 300 is 44: neither may be what a class index is compared with."""
    target = torch.tensor([0, 44, 156 if dtype == torch.uint8 else 299], dtype=dtype)
    assert check_index_target(target, (3,), 300, -100).tolist() == [True, True, True]
    with pytest.raises(ValueError, match=r"target must be class indices in \[0, 44\) or ignore_index=-100, got 44"):
        check_index_target(target[:2], (2,), 44, -100)
