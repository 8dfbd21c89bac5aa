"""SGLang's paged KV allocator where there is no Triton: the same slots, from plain torch."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """For any page size; with 1, `alloc` is all that SGLang calls."""

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots of the tokens that requests are extended by, [extend_num_tokens] int64; None: there are too few."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._has(num_new_pages):
            return None
        out = torch.empty(extend_num_tokens, dtype=torch.int64)
        alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device
        )
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """The slot of each request's next token, [requests] int64; None: there are too few."""
        begins_page = seq_lens_cpu % self.page_size == (1 % self.page_size)
        num_new_pages = int(begins_page.sum())
        if not self._has(num_new_pages):
            return None
        out = last_loc.to(torch.int64) + 1
        out[begins_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def _has(self, num_pages: int) -> bool:
        if self.need_sort and num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        return num_pages <= len(self.free_pages)
