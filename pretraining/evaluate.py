"""What calm-tiny knows, on data it never met: `python -m pretraining.evaluate --data ../shared/data/esc10`.

Zero-shot in words (likelihood of every class name: among all, and among four listed options), and few-shot on its
heads (SAV, CALM, linear probe) for decoder, encoder and both, folds apart. Beside it: the same model with a random
decoder, and the mean log-mel spectrum with a linear probe. Prints a Markdown table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from calm_pl.backbone import FrozenLALM
from calm_pl.backbone.answers import label_log_likelihoods
from calm_pl.baselines import SAV, LinearProbe
from calm_pl.clip import Clip, length_batches
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.calm import Calm
from pretraining.labels import OPEN_QUESTION, options_text

METHODS = {"SAV": SAV, "CALM": Calm, "CALM whitened": lambda: Calm("whitened"), "linear probe": LinearProbe}


def read_esc(folder: Path) -> tuple[list[Clip], Tensor, Tensor, list[str]]:
    """Clips, labels, folds and class names of a folder laid out as ESC-50 is."""
    lines = [line.split(",") for line in next((folder / "meta").glob("*.csv")).read_text().split()[1:]]
    names = sorted({row[3] for row in lines})
    clips = [Clip(str(folder / "audio" / row[0]), row[3].replace("_", " "), group=row[1]) for row in lines]
    labels = torch.tensor([names.index(row[3]) for row in lines])
    return clips, labels, torch.tensor([int(row[1]) for row in lines]), [n.replace("_", " ") for n in names]


def zero_shot(
    lalm: FrozenLALM, clips: list[Clip], labels_N: Tensor, names: list[str], options: int | None = None
) -> dict[str, float]:
    """Accuracy of the likeliest class name, by its log-likelihood per token and by its sum.

    With `options`, the prompt lists that many names, the true one among them, and only those can be chosen.
    """
    rng, listed_NC = np.random.default_rng(0), torch.zeros(len(clips), len(names), dtype=torch.bool)
    asked = list(clips)
    for n, label in enumerate(labels_N.tolist()):
        others = rng.permutation([i for i in range(len(names)) if i != label])[: (options or len(names)) - 1]
        listed = [int(i) for i in rng.permutation([label, *others])]
        listed_NC[n, listed] = True
        if options is not None:
            question = options_text(OPEN_QUESTION, [names[i] for i in listed])
            asked[n] = Clip(clips[n].audio, clips[n].label, question=question)
    tokens_C = torch.tensor([len(lalm.processor.tokenizer(n, add_special_tokens=False).input_ids) for n in names])
    scores_NC = torch.empty(listed_NC.shape)
    for batch in length_batches(asked, 16):
        chosen = [asked[i] for i in batch]
        inputs = lalm.processor(chosen, [lalm.processor.load(clip) for clip in chosen])
        scores_NC[batch] = label_log_likelihoods(lalm, inputs, names).cpu()
    found = {"mean": scores_NC, "sum": scores_NC * tokens_C}
    return {
        f"{kind} log-likelihood": round(
            (s_NC.masked_fill(~listed_NC, -torch.inf).argmax(1) == labels_N).float().mean().item(), 4
        )
        for kind, s_NC in found.items()
    }


def few_shot(
    method: type[HeadClassifier], heads_NKD: Tensor, labels_N: Tensor, folds_N: Tensor, shots: int, draws: int
) -> float:
    """Mean accuracy over folds and draws: support from four folds, all of the fifth judged."""
    found, classes = [], int(labels_N.max()) + 1
    for fold in folds_N.unique().tolist():
        pool, test = torch.nonzero(folds_N != fold)[:, 0], folds_N == fold
        for draw in range(draws):
            order = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(1000 * fold + draw))]
            support = torch.cat([order[labels_N[order] == c][:shots] for c in range(classes)])
            fitted = method().fit(heads_NKD[support], labels_N[support], classes)
            found.append((fitted(heads_NKD[test]).argmax(1) == labels_N[test]).float().mean().item())
    return round(float(np.mean(found)), 4)


def random_decoder(checkpoint: Path, folder: Path) -> Path:
    """The same encoder and projector under a decoder that was never trained."""
    trained = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    fresh = Qwen2AudioForConditionalGeneration(trained.config)
    fresh.model.audio_tower.load_state_dict(trained.model.audio_tower.state_dict())
    fresh.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    fresh.save_pretrained(folder)
    for path in checkpoint.glob("*"):
        if path.suffix in (".json", ".jinja") and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def mean_log_mel(lalm: FrozenLALM, clips: list[Clip]) -> Tensor:
    """Mean and deviation of each log-mel band over the clip, as two "heads" (N, 2, 80)."""
    rows = []
    for clip in clips:
        wave = lalm.processor.load(clip).waveform_S.numpy()
        mel = lalm.processor.processor.feature_extractor(
            wave, sampling_rate=16000, padding="max_length", return_attention_mask=True
        )
        frames = np.asarray(mel.input_features[0])[:, : int(np.sum(mel.attention_mask[0]))]
        rows.append(np.stack([frames.mean(1), frames.std(1)]))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(__file__).parents[1] / "calm_pl" / "backbone" / "calm-tiny"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/esc10"))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file with every figure")
    options = parser.parse_args()
    clips, labels_N, folds_N, names = read_esc(options.data)

    lalm = FrozenLALM.from_pretrained(options.checkpoint, heads="both")
    results: dict[str, object] = {
        "zero_shot": {
            "open": zero_shot(lalm, clips, labels_N, names),
            "four options": zero_shot(lalm, clips, labels_N, names, 4),
        }
    }
    print(json.dumps(results, indent=1), flush=True)
    both_NKD = lalm.head_outputs(clips, batch_size=16)
    split = sum(name.startswith("decoder") for name in lalm.head_names)
    sources = {"decoder": both_NKD[:, :split], "encoder": both_NKD[:, split:], "both": both_NKD}
    with tempfile.TemporaryDirectory() as folder:
        fresh = FrozenLALM.from_pretrained(random_decoder(options.checkpoint, Path(folder)), heads="decoder")
        sources["random decoder"] = fresh.head_outputs(clips, batch_size=16)
    sources["mean log-mel"] = mean_log_mel(lalm, clips)

    print(
        "| heads | method |" + "".join(f" {k} |" for k in options.shots) + "\n|---|---|" + "---|" * len(options.shots)
    )
    for source, heads_NKD in sources.items():
        for name, method in METHODS.items():
            if source == "mean log-mel" and name != "linear probe":
                continue
            row = {k: few_shot(method, heads_NKD, labels_N, folds_N, k, options.draws) for k in options.shots}
            results[f"{source}, {name}"] = row
            print(f"| {source} | {name} |" + "".join(f" {100 * a:.1f} |" for a in row.values()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
