"""How much each token contributes to a generated token, from attention maps A (H, N, K) and their
gradients dy/dA. Pure functions on tensors.

    rule 5     Ā = E_h[(dy/dA * A)+]                       one map per layer; y: the raw logit of
               the generated id
    rule 6     R <- R + Ā R                                self-attention, from the first layer up
    rule 7     R_qi <- R_qi + Ā R_qi                       self-attention of queries that carry a
               map onto something else
    rule 8, 9  R̄ = I + rows of (R - I) scaled to sum 1
    rule 10    R_qi <- R_qi + R̄_qq^T Ā_c R̄_ii              cross-attention
Transformer-MM-Explainability (arXiv 2103.15679), numbers as in its code; sections 2 and 4.1 of our
study. A row of R_L is

    e_p R_L = e_p (I + Ā_L) (I + Ā_L-1) ... (I + Ā_1)

so rows are carried from the last layer down without a product of matrices: carry(). Only rule 10
needs whole matrices.
"""

import torch


def head_mean(attention, gradient):
    """Rule 5: (..., N, K) from attention and its gradient (..., H, N, K)."""
    return (attention * gradient).clamp_min(0).mean(-3)


def carry(rows, attention):
    """One layer of rule 6 for some rows of R: rows (..., R, N) or (..., N), attention Ā (..., N, N)
    -> rows + rows Ā."""
    if rows.ndim == attention.ndim - 1:
        return rows + (rows.unsqueeze(-2) @ attention).squeeze(-2)
    return rows + rows @ attention


def rollout_step(rows, attention):
    """One layer of attention rollout (arXiv 2005.00928) for some rows: rows (0.5 I + 0.5 A), A
    (..., N, N) the mean over heads."""
    return 0.5 * carry(rows, attention)


def self_attention(maps):
    """Rule 6 with whole matrices, R (..., N, N) after layers of Ā (..., N, N) from the first to the
    last."""
    relevancy = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device).expand_as(
        maps[0]
    )
    for attention in maps:
        relevancy = relevancy + attention @ relevancy
    return relevancy


def normalised(relevancy):
    """Rules 8 and 9: R̄ (..., N, N). A row of R - I that sums to 0 stays 0, where the published
    code divides by it."""
    eye = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    rest = relevancy - eye
    total = rest.sum(-1, keepdim=True)
    return eye + rest / torch.where(total > 0, total, 1.0)


def queries_to_patches(self_maps, cross_maps, patches, joint=False):
    """Rules 6, 7 and 10 through a Q-Former: (R_qq (..., n, n), R_qi (..., n, S)).

    self_maps: Ā (..., n, n) of each layer, n = queries and, behind them, instruction tokens;
    cross_maps: Ā (..., q, S) of each layer or None; patches: R_ii (..., S, S) of the tower.
    Instruction tokens do not read the picture: their rows of a cross map are 0. In a layer
    self-attention comes first; both of its updates use the old values. InstructBLIP (arXiv
    2305.06500) by our study's sections 1.8 and 2.4.

    joint: the two maps of a layer are the blocks [Ā_qq | Ā_qi] of one, with one softmax over
    queries and patches, so neither comes first and rule 10 takes the old R_qq too. mPLUG-Owl2's
    abstractor (arXiv 2311.04257) by our study's section 2.5."""
    count, size = self_maps[0].shape[-1], patches.shape[-1]
    eye = torch.eye(count, dtype=patches.dtype, device=patches.device)
    own, onto = (
        eye.expand(*self_maps[0].shape[:-2], count, count),
        patches.new_zeros(*self_maps[0].shape[:-2], count, size),
    )
    context = normalised(patches)
    for attention, cross in zip(self_maps, cross_maps, strict=True):
        before, own, onto = own, own + attention @ own, onto + attention @ onto
        if cross is not None:
            cross = torch.nn.functional.pad(cross, (0, 0, 0, count - cross.shape[-2]))
            onto = onto + normalised(before if joint else own).transpose(-1, -2) @ cross @ context
    return own, onto


def sinks(norms, factor=6.0):
    """(P,) bool: vision tokens whose norm (P,) is an outlier, more than `factor` robust deviations
    (1.48 times the median absolute one) over the median.

    High-norm patches of a tower gather relevancy whatever is asked (Vision Transformers Need
    Registers, arXiv 2309.16588).
    """
    middle = norms.median()
    return norms > middle + factor * 1.4826 * (norms - middle).abs().median().clamp_min(
        1e-6 * middle.abs()
    )


def share(image, text, how="max"):
    """Visual contribution of a token: image relevancy over image and text relevancy together, in
    [0, 1]. image (..., P), text (..., N) of earlier text tokens; how: max, sum or mean over tokens.
    ratio_of() gives the published ratio."""
    image, text = _reduced(image, how), _reduced(text, how)
    total = image + text
    return torch.where(total > 0, image / torch.where(total > 0, total, 1.0), torch.nan)


def ratio_of(image, text, how="max"):
    """The stethoscope's visual contribution agg(R_img) / agg(R_text); inf where no text counts."""
    return _reduced(image, how) / _reduced(text, how)


def _reduced(values, how):
    if how not in ("max", "sum", "mean"):
        raise ValueError(f"aggregation {how!r}: max, sum or mean is wanted")
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    return values.amax(-1) if how == "max" else values.sum(-1) if how == "sum" else values.mean(-1)
