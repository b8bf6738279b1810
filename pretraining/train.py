"""Train calm-tiny's decoder on kept encoder outputs: `python -m pretraining.train --whisper DIR`.

Two objectives. The answers to questions, by cross-entropy. And heads that keep what they hear: at the last prompt
token the cosines between clips in every decoder head are drawn to those of the teacher (Whisper's pooled encoder
heads and the cross-attention heads of its own decoder) in the teacher's within-class metric. Without the second, the
decoder forgets whatever its labels do not need.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration

from pretraining.encode import Recorder
from pretraining.labels import OPEN_QUESTION, SUFFIX
from pretraining.model import build_model, build_processor, build_tokenizer, load_whisper, spread_projector
from pretraining.questions import Packed, Questioner, Rng, every_text, pack

# Audio tokens of a clip seen in one step, at most, drawn at random; few are cheap, and towards the end of training
# most clips are seen whole, as they are when the model is used.
KEPT = (8, 16, 40, 125)
KEPT_CHANCE, KEPT_CHANCE_LATE, LATE = (0.5, 0.3, 0.12, 0.08), (0.1, 0.1, 0.3, 0.5), 0.7
SECOND = 0.45  # share of steps with a second question behind each clip


def teacher_features(
    teacher_NE: Tensor, labels_N: Tensor, fit: Tensor, size: int = 64, shrinkage: float = 0.1
) -> Tensor:
    """Teacher vectors in their within-class metric, cut to the `size` directions that tell labels apart best.

    Everything is estimated on the clips `fit`; the others come out zero.
    """
    x, labels = teacher_NE[fit] - teacher_NE[fit].mean(0), labels_N[fit]
    means = torch.zeros(int(labels_N.max()) + 1, x.shape[1]).index_add_(0, labels, x)
    means /= torch.bincount(labels, minlength=len(means)).clamp(min=1)[:, None]
    within = x - means[labels]
    covariance = within.T @ within / len(x)
    covariance = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * torch.eye(x.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    white = x @ (vectors / values.sqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(white.T @ white)
    features = torch.zeros(len(teacher_NE), size)
    features[fit] = F.normalize(white @ directions[:, -size:], dim=-1)
    return features


def forward(model: Qwen2AudioForConditionalGeneration, audio_BTE: Tensor, packed: Packed) -> Tensor:
    """Final hidden states B T E of packed questions."""
    embedded = model.model.language_model.embed_tokens(packed.ids_BT)
    projected = model.model.multi_modal_projector(audio_BTE)
    index = packed.audio_BT.clamp(min=0)[..., None].expand(-1, -1, projected.shape[-1])
    embedded = torch.where((packed.audio_BT >= 0)[..., None], projected.gather(1, index).to(embedded.dtype), embedded)
    return model.model.language_model(
        inputs_embeds=embedded, attention_mask=packed.mask_B1TT, position_ids=packed.positions_BT, use_cache=False
    ).last_hidden_state


class Batches:
    """Random batches of cached clips: rare labels drawn more often, and of each clip a random part of its audio tokens.

    A step costs in proportion to its tokens; the places of those kept stay what they are in the whole clip.
    """

    def __init__(self, work: Path, only: list[str] | None = None) -> None:
        self.clips = [json.loads(line) for line in (work / "manifest.jsonl").open()]
        self.tokens = np.load(work / "tokens.npy", mmap_mode="r")
        self.lengths = np.load(work / "lengths.npy")
        self.names = sorted({c["label"] for c in self.clips})
        self.labels = np.array([self.names.index(c["label"]) for c in self.clips])
        allowed = np.array([only is None or c["label"] in only for c in self.clips])
        self.train = np.flatnonzero([c["split"] == "train" for c in self.clips] & allowed)
        self.val = np.flatnonzero([c["split"] == "val" for c in self.clips] & allowed)
        weight = np.bincount(self.labels[self.train], minlength=len(self.names)).clip(1) ** -0.6
        recorded = np.array([1.5 if self.clips[i]["kind"] == "recorded" else 1.0 for i in self.train])
        self.chance = weight[self.labels[self.train]] * recorded
        self.chance /= self.chance.sum()

    def draw(self, rng: Rng, size: int, late: bool) -> tuple[np.ndarray, Tensor, list[np.ndarray]]:
        chosen = rng.choice(self.train, size, p=self.chance)
        limit = int(rng.choice(KEPT, p=KEPT_CHANCE_LATE if late else KEPT_CHANCE))
        return chosen, *self.read(chosen, limit, rng)

    def read(self, chosen: np.ndarray, limit: int = 125, rng: Rng | None = None) -> tuple[Tensor, list[np.ndarray]]:
        """Encoder outputs (B, T, E) and the places in the clip that they are from."""
        places = [np.arange(self.lengths[i]) for i in chosen]
        if rng is not None:
            places = [np.sort(rng.permutation(p)[:limit]) for p in places]
        audio = np.zeros((len(chosen), max(map(len, places)), self.tokens.shape[-1]), np.float32)
        for row, (i, place) in enumerate(zip(chosen, places, strict=True)):
            audio[row, : len(place)] = self.tokens[i][place]
        return torch.from_numpy(audio), places


@torch.no_grad()
def validate(
    model: Qwen2AudioForConditionalGeneration,
    batches: Batches,
    tokenizer: PreTrainedTokenizerFast,
    questioner: Questioner,
    count: int = 160,
) -> str:
    """First answer token right, on clips of files that were not trained on, open and with four options."""
    model.eval()
    rng, right, per_kind = np.random.default_rng(0), np.zeros(2), {}
    chosen = rng.permutation(batches.val)[:count]
    for part in np.array_split(chosen, max(len(chosen) // 16, 1)):
        asked = [
            [
                (OPEN_QUESTION + SUFFIX, batches.clips[i]["label"]),
                questioner.choice(rng, batches.clips[i]["label"], True),
            ]
            for i in part
        ]
        audio, places = batches.read(part)
        packed = pack(tokenizer, places, asked)
        with torch.autocast("cpu", torch.bfloat16):
            states = forward(model, audio, packed)
            last = states.gather(1, packed.last_BQ[..., None].expand(-1, -1, states.shape[-1]))
            guess = model.lm_head(last).argmax(-1)
        hit = (guess == packed.targets_BT.gather(1, packed.last_BQ)).float().numpy()
        right += hit.sum(0)
        for i, h in zip(part, hit[:, 0], strict=True):
            per_kind.setdefault(batches.clips[i]["kind"], []).append(h)
    model.train()
    kinds = " ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(per_kind.items()))
    return f"val open {right[0] / len(chosen):.3f} ({kinds}) choice {right[1] / len(chosen):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/calm-tiny"))
    parser.add_argument("--whisper", type=Path, required=True, help="folder of whisper-tiny.en")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--heads-weight", type=float, default=2.0, help="weight of the heads' objective")
    parser.add_argument("--sanity", type=int, default=0, help="train on so many labels only")
    parser.add_argument("--resume", action="store_true", help="go on from WORK/checkpoint, with a fresh optimiser")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)

    batches = Batches(options.work)
    if options.sanity:
        counts = np.bincount(batches.labels)
        batches = Batches(options.work, [batches.names[i] for i in np.argsort(-counts)[: options.sanity]])
    questioner = Questioner(batches.clips)
    if options.resume:
        tokenizer = AutoTokenizer.from_pretrained(options.work / "checkpoint")
        model = Qwen2AudioForConditionalGeneration.from_pretrained(options.work / "checkpoint", dtype=torch.float32)
    else:
        tokenizer = build_tokenizer(every_text(questioner))
        model = build_model(load_whisper(options.whisper), tokenizer)
        sample = [batches.tokens[i, : batches.lengths[i]] for i in rng.choice(batches.train, 600)]
        spread_projector(model, torch.from_numpy(np.concatenate(sample).astype(np.float32)))
    model.train().model.audio_tower.requires_grad_(False)

    teacher = torch.from_numpy(np.load(options.work / "teacher.npy").astype(np.float32)).unflatten(1, (-1, 384))
    groups = [*teacher[:, :4].unbind(1), teacher[:, 5::2].flatten(1)]  # four encoder layers, Whisper's cross-attention
    labels = torch.from_numpy(batches.labels)
    features = [teacher_features(g, labels, torch.from_numpy(batches.train)) for g in groups]
    features.append(F.normalize(torch.cat(features, 1), dim=-1))  # the sixth layer: all of them together
    layers = model.model.language_model.layers
    recorder = Recorder([layer.self_attn.o_proj for layer in layers])

    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.02, betas=(0.9, 0.98))
    begun, step, shown = time.monotonic(), 0, np.zeros(3)
    saved = begun
    while (share := (time.monotonic() - begun) / (60 * options.minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = (
                options.rate * min((step + 1) / 100, 1) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            )
        chosen, audio, places = batches.draw(rng, options.batch, share > LATE)
        second = rng.random() < SECOND
        packed = pack(tokenizer, places, [questioner.draw(rng, batches.clips[i], second) for i in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            states = forward(model, audio, packed)
            answers = packed.targets_BT >= 0
            logits = model.lm_head(states[answers])
        asked = F.cross_entropy(logits.float(), packed.targets_BT[answers])
        heard = heads_loss(recorder.take(), packed.last_BQ[:, :2], [f[chosen] for f in features])
        (asked + options.heads_weight * heard).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        shown += (asked.item(), heard.item(), 1)
        step += 1
        if step % 100 == 0:
            rate = step * options.batch / (time.monotonic() - begun)
            print(
                f"step {step} answers {shown[0] / shown[2]:.3f} heads {shown[1] / shown[2]:.4f} {rate:.1f} clips/s",
                flush=True,
            )
            shown[:] = 0
        if step % 250 == 0:
            print(f"{share:.2f} {validate(model, batches, tokenizer, questioner)}", flush=True)
            recorder.take()
        if time.monotonic() - saved > 480:
            save(model, tokenizer, questioner, options.work / "checkpoint")
            saved = time.monotonic()
    print(f"end, {step} steps: {validate(model, batches, tokenizer, questioner, 720)}", flush=True)
    save(model, tokenizer, questioner, options.work / "checkpoint")


def heads_loss(inputs: list[Tensor], last_BQ: Tensor, features: list[Tensor]) -> Tensor:
    """Mean squared gap between the cosines of clip pairs in each head and in the layer's teacher."""
    total = torch.zeros(())
    different = ~torch.eye(len(last_BQ), dtype=torch.bool)
    for x_BTE, wanted in zip(inputs, features, strict=True):
        heads = x_BTE.float().gather(1, last_BQ[..., None].expand(-1, -1, x_BTE.shape[-1])).unflatten(-1, (-1, 64))
        heads = F.normalize(heads, dim=-1)
        cosines = torch.einsum("iqhd,jqhd->qhij", heads, heads)
        gap = (cosines - (wanted @ wanted.T)) ** 2
        total = total + gap[..., different].mean()
    return total / len(inputs)


def save(
    model: Qwen2AudioForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, questioner: Questioner, folder: Path
) -> None:
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    (folder / "labels.txt").write_text("\n".join(sorted({name for name, _ in questioner.names})) + "\n")


if __name__ == "__main__":
    main()
