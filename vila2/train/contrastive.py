"""A vision tower learnt from images and their alt-texts alone: SigLIP's sigmoid loss (arXiv 2303.15343), word by word.

Every pair of an image and a word of the batch is a binary question: does the image's alt-text say the word? An image
answers by its patch that fits best (a smooth maximum, as FILIP's token-wise similarity, arXiv 2111.07783), so that what
a word names is learnt where it stands. Whole texts as single vectors were tried first: alt-texts name one or two of
three things, and a small tower stayed at chance.

The tower sees only the patches of each image that vary most: a masked tower learns as much an image for less work
(FLIP, arXiv 2212.00794), and in a picture with a plain background the dull patches go first. What comes out is the
tower; the heads are thrown away.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.model.vision import LayerNorm, VisionTower
from vila2.ops.linear import Linear
from vila2.ops.patches import image_patches
from vila2.train.tower_loop import TowerPair


def lively_features(tower: VisionTower, tiles: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Features (N, keep, width) of the `keep` patches of each tile (N, S, S, 3) whose values vary most, and their
    numbers (N, keep), in order. With every patch kept it is the forward pass of a SigLIP tower.
    """
    config = tower.config
    dtype = tower.position_embedding.dtype
    patches = image_patches(tiles, config.patch_size, tower.image_mean, tower.image_std, dtype)
    # Within each channel: not what colour it is.
    contrast = patches.reshape(*patches.shape[:-1], 3, -1).std(dim=-1).sum(dim=-1)
    kept = contrast.topk(min(keep, patches.shape[1]), dim=1).indices.sort(dim=1).values
    x = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
    x = tower.patch_embedding(x) + tower.position_embedding[kept]
    for layer in tower.layers:
        x = layer(x)
    return x, kept


_RARE = -6.0


class WordContrast(TowerPair):
    """Tower, a head for its patches, a vector and a shift for each word, and the scale of their similarity.

    A word is a token. The shifts start at the odds of a rare word, or of each word (`start_shifts`).
    """

    def __init__(self, vision: VisionTower, vocab_size: int, size: int = 128) -> None:
        super().__init__(vision)
        self.norm = LayerNorm(vision.config.width)
        self.patch = Linear(vision.config.width, size)
        self.word = nn.Embedding(vocab_size, size)
        self.shift = nn.Parameter(torch.full((vocab_size,), _RARE))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    @torch.no_grad()
    def start_shifts(self, shares: Mapping[int, float]) -> None:
        """Start at the odds of each word, which no image has to teach then; `shares`: word -> of the texts."""
        for word, share in shares.items():
            self.shift[word] = math.log(share / (1 - share)) if share < 1 else -_RARE

    def logits(self, tiles: Tensor, words: Tensor, keep: int) -> Tensor:
        """Scores (images, words) of uint8 tiles (N, S, S, 3) and token ids (words,), from `keep` patches an image."""
        features, _ = lively_features(self.vision, tiles, keep)
        patches = functional.normalize(self.patch(self.norm(features)), dim=-1)
        vectors = functional.normalize(self.word(words), dim=-1)
        similar = self.log_scale.exp() * (patches @ vectors.T)  # (images, patches, words)
        return similar.logsumexp(dim=1) - math.log(patches.shape[1]) + self.shift[words]

    def forward(self, tiles: Tensor, texts: Sequence[Sequence[int]], keep: int) -> Tensor:
        """The sigmoid loss over all pairs of an image and a word of these texts, a mean over images."""
        words = torch.tensor(sorted({token for text in texts for token in text}), device=tiles.device)
        said = torch.zeros(len(texts), len(self.shift), device=tiles.device)
        for row, text in zip(said, texts, strict=True):
            row[list(text)] = 1.0
        logits = self.logits(tiles, words, keep)
        pairs = functional.binary_cross_entropy_with_logits(logits, said[:, words], reduction="sum")
        return pairs / len(texts)
