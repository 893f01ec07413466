"""flash-attn's interface on fastattn's kernels, on CPUs too: `from fastattn.compat.flash_attn import flash_attn_func`.

`flash_attn_interface` and `bert_padding` are where flash-attn has them.
"""

from __future__ import annotations

from fastattn.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__version__ = "2.8.3"  # the release of flash-attn whose interface this is, which its users compare
