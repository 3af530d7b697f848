"""Products of LoRA's factors: find the pairs of factors, and the best rank-r factors of a sum of products without
computing the product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ..errors import SkillError
from ..map.lora import PARTNER, factor_in

OTHER = {**PARTNER, **{b: a for a, b in PARTNER.items()}}


def factor_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of each LoRA pair's A and B, matched by path segment. Tensors that are not factors (full tensors, a
    bias trained with B) are left out.

    Raises:
        SkillError: an A lacks its B, or the other way round.
    """
    known = dict.fromkeys(names)
    out = []
    for name in known:
        parts = name.split(".")
        at = factor_in(parts)
        if at is None or parts[-1] == "bias":
            continue
        other = ".".join([*parts[:at], OTHER[parts[at]], *parts[at + 1 :]])
        if other not in known:
            raise SkillError(f"{name} has no partner {other}; give the complete adapter, both A and B")
        if parts[at] in PARTNER:
            out.append((name, other))
    return out


def best_factors(
    pairs: Sequence[tuple[Tensor, Tensor, Tensor | float]],
    rank: int,
    like: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors A `[rank, in, ...]`, B `[out, rank, ...]` whose product `B A` is the best of that rank, in the Frobenius
    norm, to

        M = sum_i B_i diag(w_i) A_i        (Eckart and Young 1936)

    Stacked, `M = [B_1 B_2 ...] D [A_1; A_2; ...]`, with `[B_1 B_2 ...] = Q_B R_B` and `[A_1; A_2; ...]^T = Q_A R_A`.
    The small matrix `R_B D R_A^T = U S V^T`, whose sides are at most the sum of the ranks, has M's singular values, so
    `Q_B U` and `Q_A V` are M's singular vectors: M `[out, in]` itself is never computed.

    Infinitely many factors have this product, `B R^-1` and `R A` for any invertible R. The result is balanced, with the
    root of the singular values on each side. With `like`, it is rotated (R orthogonal) to be nearest to the given
    factors, `R = V U^T` from `A A_like^T + B^T B_like = U S V^T` (orthogonal Procrustes), so that pair r stays as close
    as possible to pair r of `like`; without it, the singular directions are in descending order, and the largest
    element of each row of A is positive. A direction without any share in M gets a row of length one in A and zeros in
    B, like LoRA's start, because a pair with zeros on both sides could never learn again.

    Args:
        pairs: for each product A `[r_i, in, ...]`, B `[out, r_i, ...]` and its weights, `[r_i]` or one number. Further
        dimensions (a convolution's kernel) are flattened into `in`; those of B must have size one.
        rank: the result's rank. like: A, B of that rank.

    Returns:
        A and B in the dtype and on the device of the first pair; computed in float64 on the CPU.

    Raises:
        SkillError: there are no pairs, the rank is below 1, or factors do not fit each other.
    """
    if not pairs or rank < 1:
        raise SkillError(f"got {len(pairs)} pairs and rank {rank}, expected at least one pair and a rank of at least 1")
    first_a, first_b, _ = pairs[0]
    shapes = (first_a.shape[1:], (first_b.shape[0], *first_b.shape[2:]))
    for i, (a, b, w) in enumerate(pairs):
        if (a.shape[1:], (b.shape[0], *b.shape[2:])) != shapes:
            raise SkillError(
                f"pair {i} is A {list(a.shape)}, B {list(b.shape)}; the first is A {list(first_a.shape)}, "
                f"B {list(first_b.shape)}: they must agree in all but the rank"
            )
        fit_each_other(f"pair {i}", a, b)
        if isinstance(w, Tensor) and w.shape not in ((), (1,), (len(a),)):
            raise SkillError(
                f"pair {i}: got weights {list(w.shape)}, expected one number or [{len(a)}], one per row of A"
            )
    if like is not None and (len(like[0]), like[1].shape[1]) != (rank, rank):
        raise SkillError(f"like: got A {list(like[0].shape)}, B {list(like[1].shape)}, expected rank {rank}")
    weights = torch.cat([torch.as_tensor(w, dtype=torch.float64, device="cpu").expand(len(a)) for a, _, w in pairs])
    left, left_r = torch.linalg.qr(torch.cat([_matrix(b) for _, b, _ in pairs], 1))
    right, right_r = torch.linalg.qr(torch.cat([_matrix(a) for a, _, _ in pairs]).T)
    u, s, vt = torch.linalg.svd((left_r * weights) @ right_r.T, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    none = s <= s[0] * torch.finfo(s.dtype).eps * max(left_r.shape[1], 1)
    root = s.sqrt()
    new_a = torch.zeros(rank, right.shape[0], dtype=s.dtype)
    new_b = torch.zeros(left.shape[0], rank, dtype=s.dtype)
    new_a[: len(s)] = torch.where(none, 1.0, root)[:, None] * (vt @ right.T)
    new_b[:, : len(s)] = torch.where(none, 0.0, root) * (left @ u)
    if like is not None:
        goal_a, goal_b = _matrix(like[0]), _matrix(like[1])
        u, _, vt = torch.linalg.svd(new_a @ goal_a.T + new_b.T @ goal_b)
        turn = vt.T @ u.T
        new_a, new_b = turn @ new_a, new_b @ turn.T
    else:
        largest = new_a.gather(1, new_a.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        new_a, new_b = new_a * sign, new_b * sign.T
    a = new_a.to(first_a).view(rank, *first_a.shape[1:])
    return a, new_b.to(first_b).view(first_b.shape[0], rank, *first_b.shape[2:])


def fit_each_other(what: str, a: Tensor, b: Tensor) -> None:
    """Raise `SkillError` if B A is not a product of two matrices."""
    if a.dim() < 2 or b.dim() < 2 or any(size != 1 for size in b.shape[2:]):
        raise SkillError(f"{what}: got A {list(a.shape)}, B {list(b.shape)}, expected A [rank, in, ...], B [out, rank]")
    if a.shape[0] != b.shape[1]:
        raise SkillError(
            f"{what}: A {list(a.shape)} has rank {a.shape[0]}, B {list(b.shape)} has rank {b.shape[1]}; the LoRA of "
            "a grouped convolution is not a product of two matrices, use average='factors' or leave it out of "
            "target_modules"
        )


def _matrix(x: Tensor) -> Tensor:
    return rearrange(x.detach().to("cpu", torch.float64), "row ... -> row (...)")
