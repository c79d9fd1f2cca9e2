"""Beam search: which sequences to keep. The loop that runs the model is ``own.decode_beams``."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


class Beams:
    """The best ``num_beams`` unfinished and finished continuations of each of B rows.

    The rules are the defaults of transformers. The score of a continuation is the sum of its
    log-probabilities divided by its length. A continuation that ends in a stop token keeps its
    score. A row is done once ``num_beams`` are finished and the best unfinished one, at its present
    length, scores lower than all of them.

    Attributes
    ----------
    tokens : Tensor
        int64 [B, K, n], the unfinished continuations.
    """

    def __init__(self, rows: int, num_beams: int, stops: Tensor, pad_token_id: int) -> None:
        device = stops.device
        self.num_beams = num_beams
        self._stops = stops
        self._pad = pad_token_id
        self.tokens = torch.zeros(rows, num_beams, 0, dtype=torch.int64, device=device)
        # All beams start equal, so only the first is extended at first.
        self._scores = torch.full((rows, num_beams), NEVER, device=device)
        self._scores[:, 0] = 0
        self._finished = self.tokens.clone()
        self._finished_scores = torch.full((rows, num_beams), NEVER, device=device)
        self._done = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def done(self) -> bool:
        """Whether no unfinished continuation can be among the best any more."""
        return bool(self._done.all())

    def extend(self, log_probabilities: Tensor) -> Tensor:
        """Choose the next tokens.

        Parameters
        ----------
        log_probabilities : Tensor
            fp32 [B, K, V], of the next token of each unfinished continuation.

        Returns
        -------
        Tensor
            int64 [B, K], the beam that each new continuation extends.
        """
        _, beams, vocab = log_probabilities.shape
        totals = (self._scores[..., None] + log_probabilities).flatten(1)
        # Enough to continue all beams even if the best tokens of each are all stop tokens.
        wanted = min((1 + len(self._stops)) * beams, totals.shape[1])
        totals, index = totals.topk(wanted, dim=1)
        parents, tokens = index // vocab, index % vocab
        stops = torch.isin(tokens, self._stops)
        candidates = torch.cat((self._of(self.tokens, parents), tokens[..., None]), 2)

        length = candidates.shape[2]
        among_best = torch.arange(wanted, device=tokens.device) < beams
        self._finish(candidates, (totals / length).masked_fill(~(stops & among_best), NEVER))

        going_on = stops.long().argsort(dim=1, stable=True)[:, :beams]
        stopped = stops.gather(1, going_on)  # only if the vocabulary has too few other tokens
        self._scores = totals.gather(1, going_on).masked_fill(stopped, NEVER)
        self.tokens = self._of(candidates, going_on)
        best_running = self._scores.amax(1) / length
        self._done |= self._finished_scores.amin(1) >= best_running
        return parents.gather(1, going_on)

    def best(self, count: int) -> Tensor:
        """Return the best continuations, int64 [B * count, n], padded after their stop token."""
        length = max(self.tokens.shape[2], 1)
        running = (self._scores / length).masked_fill(self._done[:, None], NEVER)
        self._finish(self.tokens, running)
        found = self._finished[:, :count]
        ended = torch.isin(found, self._stops).cumsum(2)
        after = torch.nn.functional.pad(ended, (1, 0))[..., :-1] > 0
        found = found.masked_fill(after, self._pad)
        longest = int((~after).sum(2).max()) if found.numel() else 0
        return found[..., :longest].flatten(0, 1)

    def _finish(self, candidates: Tensor, scores: Tensor) -> None:
        """Keep the best of the finished ones and ``candidates``, unless the row is done."""
        scores = scores.masked_fill(self._done[:, None], NEVER)
        grown = candidates.shape[2] - self._finished.shape[2]
        held = torch.nn.functional.pad(self._finished, (0, grown), value=self._pad)
        scores = torch.cat((self._finished_scores, scores), 1)
        self._finished_scores, order = scores.topk(self.num_beams, dim=1)
        self._finished = self._of(torch.cat((held, candidates), 1), order)

    @staticmethod
    def _of(sequences: Tensor, index: Tensor) -> Tensor:
        return sequences.gather(1, index[..., None].expand(-1, -1, sequences.shape[2]))
