"""Drop-ins for sentence-transformers (6.2 and newer), which has to be installed: they are its subclasses.

    from sslfast.interop.sentence_transformers import MultipleNegativesRankingLoss
    # instead of: from sentence_transformers.losses import MultipleNegativesRankingLoss

With cos_sim or dot_score memory is linear in the batch, whatever the directions and the hardness; another
similarity_fct is served by the original's own code, in its memory. GISTEmbedLoss compares two tiles, the
model's and the guide's, and keeps neither.
"""

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.interop._rows import combined, positions, products, softplus, unit, wide
from sslfast.ops import guided_lse, similarity_lse

try:
    from sentence_transformers import util
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer import losses
except ImportError as error:
    raise ImportError(
        "sslfast.interop.sentence_transformers: pip install 'sentence-transformers>=6.2'"
    ) from error

PACKAGE = "sentence_transformers"
NEEDS = "sentence-transformers>=6.2"

EPS = 1e-8  # nn.CosineSimilarity's

# The originals' methods, which serve what is not fused, also while `patch` has put others in their place.
_plain = losses.MultipleNegativesRankingLoss.compute_loss_from_embeddings
_plain_cached = losses.CachedMultipleNegativesRankingLoss.calculate_loss
_plain_gist, _sim_matrix = losses.GISTEmbedLoss.forward, losses.GISTEmbedLoss.sim_matrix


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence_transformers' loss of that name: InfoNCE of queries, documents and hard negatives.

    A hardness adds strength * stop_grad(cos) to the logits of chosen negatives: they are computed with the
    scale plus the strength, of which the gradient keeps the scale's share.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """
        Args:
            embeddings: queries, documents and any number of hard negatives, [B, D] each.
            labels: not used.
        """
        if len(embeddings) < 2 or not _is_product(self.similarity_fct) or not _dense(*embeddings):
            return _plain(self, embeddings, labels)
        batch, first = len(embeddings[0]), 0
        if self.gather_across_devices:
            embeddings = [util.all_gather_with_grad(x) for x in embeddings]
            first = util.get_rank() * batch
        if self.similarity_fct is util.cos_sim:
            embeddings = [unit(x) for x in embeddings]
        queries, docs = embeddings[0], torch.cat(embeddings[1:])
        query, doc = (x[first : first + batch] for x in embeddings[:2])
        own, every = positions(query, first), positions(queries)
        hard = [x[first : first + batch] for x in embeddings[2:]]
        positive = self.scale * products(query, doc)

        if len(set(self.directions)) == 4 and len(query) == len(docs) and not self._hardness():
            # NT-Xent's matrix: what is left out for a query and its document are their two rows of it.
            both = similarity_lse(torch.cat((query, docs)), scale=self.scale, a_ids=own.repeat(2))
            return softplus(combined([*both.chunk(2), positive]) - positive).mean()
        symmetric = set(self.directions) == {"query_to_doc", "doc_to_query"} and len(query) == len(docs)
        if symmetric and not self._hardness():
            sides = list(
                similarity_lse(query, docs, scale=self.scale, a_ids=own, b_ids=every, return_cols=True)
            )
        else:
            sides = [self._docs(query, docs, hard, own, every)]
            if "doc_to_query" in self.directions:
                sides.append(similarity_lse(doc, queries, scale=self.scale, a_ids=own, b_ids=every))
        if self.partition_mode == "per_direction":
            return torch.stack([softplus(side - positive) for side in sides]).mean(0).mean()
        # One softmax: the positive counts once for each direction that holds it.
        sides += [positive] * (len(sides) - 1)
        if "query_to_query" in self.directions:
            sides.append(similarity_lse(query, queries, scale=self.scale, a_ids=own, b_ids=every))
        if "doc_to_doc" in self.directions:
            images = every.repeat(len(docs) // len(every))
            sides.append(similarity_lse(doc, docs, scale=self.scale, a_ids=own, b_ids=images))
        return softplus(combined(sides) - positive).mean()

    def _hardness(self) -> bool:
        return self.hardness_mode is not None and self.hardness_strength > 0

    def _docs(self, query: Tensor, docs: Tensor, hard: list[Tensor], own: Tensor, every: Tensor) -> Tensor:
        """Log-sum-exp of each query's logits with all documents but its own: [B].

        Args:
            query: [B, D]; docs: [W (1 + H), D], own positives first; hard: H times [B, D], the queries' own.
            own, every: which of the W samples the queries are [B], and all of them [W].
        """
        samples = every.repeat(len(docs) // len(every))
        if not self._hardness() or self.hardness_mode == "all_negatives":
            no_sample = torch.where(torch.arange(len(docs), device=docs.device) < len(every), samples, -1)
            return self._lse(query, docs, own, no_sample, self._hardness())
        in_batch = self.hardness_mode == "in_batch_negatives"
        others = self._lse(query, docs, own, samples, in_batch)
        if not hard:
            return others
        cosines = torch.stack([products(query, x) for x in hard])
        logits = self.scale * cosines
        if not in_batch:
            logits = logits + self.hardness_strength * cosines.detach()
        return combined([others, *logits])

    def _lse(self, query: Tensor, docs: Tensor, a_ids: Tensor, b_ids: Tensor, harder: bool) -> Tensor:
        total = self.scale + self.hardness_strength * harder
        lse = similarity_lse(query, docs, scale=total, a_ids=a_ids, b_ids=b_ids)
        if not harder:
            return lse
        share = self.scale / total
        return torch.where(lse == -torch.inf, lse, share * lse + (1 - share) * lse.detach())


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """sentence_transformers' loss of that name: embeds in mini-batches, so that memory holds one at a time.

    The loss of all embeddings is computed at once: without a matrix there is nothing to divide.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Any = ("query_to_doc",),
        partition_mode: Any = "joint",
        show_progress_bar: bool = False,
        hardness_mode: Any = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices,
            directions, partition_mode, show_progress_bar, hardness_mode, hardness_strength,
        )  # fmt: skip
        self.loss.__class__ = MultipleNegativesRankingLoss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """
        Args:
            reps: for queries, documents and each hard negative its mini-batches [b, D].
            labels: not used.
            with_backward: also run the backward pass, and return a loss without a graph.
        """
        embeddings = [torch.cat(x) for x in reps]
        if not _is_product(self.similarity_fct) or not _dense(*embeddings):
            return _plain_cached(self, reps, labels, with_backward=with_backward)
        loss = self.loss.compute_loss_from_embeddings(embeddings, labels)  # type: ignore[arg-type]
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class GISTEmbedLoss(losses.GISTEmbedLoss):
    """sentence_transformers' loss of that name: InfoNCE without the negatives that a guide finds too similar.

    A negative is left out where the guide's similarity is above that of the query's own pair, less the
    margin; similarities that are equal but for rounding are kept. Another similarity_fct or
    cross_entropy_loss than the library's is served by its own code, in its memory.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        if not self._is_the_librarys():
            return _plain_gist(self, sentence_features, labels)
        features = list(sentence_features)
        guide_features = [dict(x) for x in features]
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                guide_features = [self._retokenized(x) for x in features]
            guides = embed_columns(self.guide, guide_features)
        if len(embeddings) not in (2, 3):
            raise ValueError(f"sentence_features: expected 2 or 3 columns, got {len(embeddings)}")
        return self._loss(list(embeddings), list(guides))

    def _is_the_librarys(self) -> bool:
        """Whether nothing in it has been replaced that is fused here."""
        similarity, entropy = self.similarity_fct, self.cross_entropy_loss
        return (
            type(self).sim_matrix is _sim_matrix
            and type(similarity) is nn.CosineSimilarity
            and (similarity.dim, similarity.eps) == (-1, EPS)
            and type(entropy) is nn.CrossEntropyLoss
            and (entropy.weight, entropy.reduction, entropy.label_smoothing) == (None, "mean", 0.0)
            and isinstance(self.temperature, Real)
            and self.temperature != 0
        )

    def _retokenized(self, feature: dict[str, Tensor]) -> dict[str, Tensor]:
        """A column as the guide's tokenizer has it."""
        ids: Tensor | list = feature["input_ids"]
        if "cu_seq_lens_q" in feature:  # sentences one after another, without padding
            ends = feature["cu_seq_lens_q"].tolist()
            flat = feature["input_ids"][0].tolist()
            ids = [flat[begin:end] for begin, end in zip(ends[:-1], ends[1:], strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return util.batch_to_device(self.guide.preprocess(texts), self.guide.device)

    def _loss(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        """Of anchors, positives and perhaps negatives, [B, D] each, and the guide's [B, E]."""
        batch, first = len(embeddings[0]), 0
        if self.gather_across_devices:
            embeddings, guides = (
                [x[0], *map(util.all_gather_with_grad, x[1:])] for x in (embeddings, guides)
            )
            first = util.get_rank() * batch
        rows = [unit(x, EPS) for x in embeddings]
        guides = [wide(unit(x.to(rows[0].device), EPS)) for x in guides]
        local = slice(first, first + batch)
        anchor, anchor_guide = rows[0], guides[0]
        similar = products(anchor_guide, guides[1][local])
        limit = similar - self.margin * (similar.abs() if self.margin_strategy == "relative" else 1)
        limit = limit + 16 * torch.finfo(limit.dtype).eps
        own, every = positions(anchor, first), positions(rows[1])
        scale = 1 / self.temperature

        def lse(a, guide_a, b, guide_b, a_ids=None, b_ids=None):
            return guided_lse(a, b, guide_a, guide_b, limit, scale=scale, a_ids=a_ids, b_ids=b_ids)

        sides = [lse(anchor, anchor_guide, rows[1], guides[1], own, every)]
        if self.contrast_anchors:
            sides.append(lse(anchor, anchor_guide, anchor, anchor_guide))
        if self.contrast_positives:
            sides.append(lse(rows[1][local], guides[1][local], rows[1], guides[1]))
        if len(rows) == 3:
            sides.append(lse(anchor, anchor_guide, rows[2], guides[2]))
        return softplus(combined(sides) - scale * products(anchor, rows[1][local])).mean()


def _is_product(similarity) -> bool:
    return similarity in (util.cos_sim, util.dot_score)


def _dense(*embeddings: Tensor) -> bool:
    first = embeddings[0]
    return all(
        x.layout is torch.strided
        and x.is_floating_point()
        and x.dtype == first.dtype
        and x.dim() == 2
        and len(x) == len(first)
        for x in embeddings
    )


_BASE = "sentence_transformers.sentence_transformer.losses"
SWAPS = {
    f"{_BASE}.multiple_negatives_ranking.MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    f"{_BASE}.cached_multiple_negatives_ranking.CachedMultipleNegativesRankingLoss": (
        CachedMultipleNegativesRankingLoss
    ),
    f"{_BASE}.gist_embed.GISTEmbedLoss": GISTEmbedLoss,
}
