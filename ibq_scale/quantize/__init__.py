"""Quantizers in plain torch: no DeepSpeed, no training loop, usable from a notebook.

Shape letters, the same in every module (CONTRIBUTING.md says how names carry them):

    N  tokens of this rank           K  codes of this rank's shard      D  dimensions
    M  tokens of the group's ranks   W  ranks of the group              G  segments: token ranges with one q̄ each
    B  tokens of a block             P  parts of the codes              T  tiles of the codes
    L  places for candidates         R  places for rivals               A  tokens with several possible codes
    J  values of a group of bits     Q  pairs (token, code)             X  any other dimensions

BM, BK, BD, BL, BC: tokens, codes, dimensions, list places, codes that a kernel takes at once. S = z Cᵀ are the scores.
"""
