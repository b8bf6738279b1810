"""Families that hear and read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import transformers as tf

from calm_pl.backbone.random_checkpoint import CHATML, byte_tokenizer
from tests.families.base import NEMOTRON_TEXT, QWEN2, WHISPER, mel, save


def qwen2_audio(folder: Path) -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    config = tf.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **WHISPER},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **QWEN2},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = tf.Qwen2AudioProcessor(feature_extractor=mel(), tokenizer=tokenizer)
    save(folder, tf.Qwen2AudioForConditionalGeneration, config, processor, processor.default_chat_template)


def flamingo(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tokenizer = byte_tokenizer(["<|im_start|>", "<sound>", "<|sound_bos|>", "<|sound_eos|>"])
        tokens = {"audio_token_id": "<sound>"}
        if kind == "MusicFlamingo":
            tokens |= {"audio_bos_token_id": "<|sound_bos|>", "audio_eos_token_id": "<|sound_eos|>"}
        config = getattr(tf, f"{kind}Config")(
            audio_config={"model_type": "audioflamingo3_encoder", **WHISPER},
            text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **QWEN2},
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
        )
        processor = getattr(tf, f"{kind}Processor")(feature_extractor=mel(), tokenizer=tokenizer)
        model_class = getattr(tf, f"{kind}ForConditionalGeneration")
        save(folder, model_class, config, processor, CHATML.replace("AUDIO", "<sound>"))

    return write


def glm_asr(folder: Path) -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|pad|>"])
    config = tf.GlmAsrConfig(
        audio_config={
            "model_type": "glmasr_encoder",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "num_mel_bins": 32,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **QWEN2},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    processor = tf.GlmAsrProcessor(feature_extractor=mel(), tokenizer=tokenizer)
    save(folder, tf.GlmAsrForConditionalGeneration, config, processor, CHATML.replace("AUDIO", "<|pad|>"))


GRANITE_TURN = "<|start_of_role|>assistant<|end_of_role|>"


def granite_speech(kind: str) -> Callable[[Path], None]:
    """Its template lives with the tokenizer and takes text alone, with the audio token written into it.

    As the published one does it adds texts up, which fails on a list of parts.
    """

    def write(folder: Path) -> None:
        tokenizer = byte_tokenizer(["<|im_start|>"], audio_token="<|audio|>")
        tokenizer.chat_template = (
            "{% for m in messages %}"
            "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{GRANITE_TURN}{{% endif %}}"
        )
        config = getattr(tf, f"{kind}Config")(
            text_config={"model_type": "granite", "vocab_size": len(tokenizer), **QWEN2},
            encoder_config={"input_dim": 160, "num_layers": 2, "hidden_dim": 32, "num_heads": 2, "feedforward_mult": 2,
                            "output_dim": 8, "context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 5},
            projector_config={"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1,
                              "num_attention_heads": 2, "intermediate_size": 32, "encoder_hidden_size": 32},
            audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"), has_lora_adapter=False,
        )  # fmt: skip
        processor = tf.GraniteSpeechProcessor(tf.GraniteSpeechFeatureExtractor(), tokenizer)
        save(folder, getattr(tf, f"{kind}ForConditionalGeneration"), config, processor)

    return write


def qwen3_asr(folder: Path) -> None:
    tokenizer = byte_tokenizer(
        ["<|im_start|>"], audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>",
        audio_eos_token="<|audio_end|>",
    )  # fmt: skip
    config = tf.Qwen3ASRConfig(
        audio_config={"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32,
                      "num_mel_bins": 32, "output_dim": 32, "downsample_hidden_size": 8, "n_window_infer": 100},
        text_config={"model_type": "qwen3", "vocab_size": len(tokenizer), "head_dim": 16, **QWEN2},
        audio_token_id=tokenizer.audio_token_id, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    processor = tf.Qwen3ASRProcessor(tf.Qwen3ASRFeatureExtractor(feature_size=32, chunk_length=2), tokenizer)
    template = CHATML.replace("AUDIO", "<|audio_start|><|audio_pad|><|audio_end|>")
    save(folder, tf.Qwen3ASRForConditionalGeneration, config, processor, template)


def fun_asr_nano(folder: Path) -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|object_ref_start|>"])
    config = tf.FunAsrNanoConfig(
        audio_config={"num_mel_bins": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
                      "num_hidden_layers": 2, "num_timestamp_prediction_layers": 0, "fsmn_kernel_size": 3},
        adaptor_config={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1,
                        "projector_hidden_size": 32},
        text_config={"model_type": "qwen3", "vocab_size": len(tokenizer), "head_dim": 16, **QWEN2},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|object_ref_start|>"),
    )  # fmt: skip
    processor = tf.FunAsrNanoProcessor(tf.FunAsrNanoFeatureExtractor(feature_size=32), tokenizer)
    template = CHATML.replace("AUDIO", "<|object_ref_start|>")
    save(folder, tf.FunAsrNanoForConditionalGeneration, config, processor, template)


def moss_transcribe(folder: Path) -> None:
    """Seconds are counted in the prompt, between the audio tokens."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"])
    config = tf.MossTranscribeDiarizeConfig(
        audio_config={"num_mel_bins": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                      "hidden_size": 32, "max_source_positions": 100},
        text_config={"model_type": "qwen3", "vocab_size": len(tokenizer), "head_dim": 16, **QWEN2},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"), audio_chunk_size=32_000,
    )  # fmt: skip
    extractor = tf.MossTranscribeDiarizeFeatureExtractor(feature_size=32, chunk_length=2)
    processor = tf.MossTranscribeDiarizeProcessor(extractor, tokenizer)
    template = CHATML.replace("AUDIO", "<|audio_start|><|audio_pad|><|audio_end|>")
    save(folder, tf.MossTranscribeDiarizeForConditionalGeneration, config, processor, template)


def vibevoice_asr(folder: Path) -> None:
    """Hears by convolutions; there are no encoder heads."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|box_start|>", "<|object_ref_start|>", "<|object_ref_end|>"])
    hears = {"model_type": "vibevoice_acoustic_tokenizer_encoder", "num_filters": 4, "depths": [1] * 7,
             "hidden_size": 8}  # fmt: skip
    config = tf.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=hears, semantic_tokenizer_encoder_config=hears,
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **QWEN2},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|box_start|>"),
    )  # fmt: skip
    processor = tf.VibeVoiceAsrProcessor(tf.VibeVoiceAcousticTokenizerFeatureExtractor(), tokenizer)
    template = CHATML.replace("AUDIO", "<|object_ref_start|><|box_start|><|object_ref_end|>")
    save(folder, tf.VibeVoiceAsrForConditionalGeneration, config, processor, template)


def voxtral(folder: Path) -> None:
    """A tokenizer of mistral-common, which makes the prompt and takes the audio by itself."""
    controls = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
                *[f"<SPECIAL_{i}>" for i in range(20, 24)], "[AUDIO]", "[BEGIN_AUDIO]",
                *[f"<SPECIAL_{i}>" for i in range(26, 34)], "[TRANSCRIBE]"]  # fmt: skip
    tekken = {
        "config": {"pattern": ".", "num_vocab_tokens": 256, "default_vocab_size": 256 + len(controls),
                   "default_num_special_tokens": len(controls), "version": "v7"},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
                  for i in range(256)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(controls)],
        "audio": {"sampling_rate": 16000, "frame_rate": 12.5,
                  "audio_encoding_config": {"num_mel_bins": 32, "hop_length": 160, "window_size": 400},
                  "chunk_length_s": 30.0},
    }  # fmt: skip
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tekken.json").write_text(json.dumps(tekken))
    tokenizer = tf.MistralCommonBackend.from_pretrained(folder)
    config = tf.VoxtralConfig(
        audio_config=WHISPER | {"encoder_ffn_dim": 128, "max_source_positions": 1500},
        text_config={"model_type": "llama", "vocab_size": 256 + len(controls), "head_dim": 16, **QWEN2},
        audio_token_id=24,
    )
    save(folder, tf.VoxtralForConditionalGeneration, config, tf.VoxtralProcessor(mel(30), tokenizer))


def nemotron_transcribe(folder: Path) -> None:
    """Two encoders, of what is said and of who says it; few of the decoder's layers attend."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|audio|>"])
    hears = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_mel_bins": 32}  # fmt: skip
    config = tf.Nemotron3_5TranscribeConfig(
        text_config={**NEMOTRON_TEXT, "vocab_size": len(tokenizer)},
        audio_config={
            "asr_config": hears,
            "diarization_config": {
                "audio_config": hears, "head_config": {"hidden_size": 16, "audio_hidden_size": 32, "num_speakers": 2},
                "streaming_config": {"num_speakers": 2, "speaker_cache_length": 8}, "chunk_length": 500,
            },
        },
        word_timestamp_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "vocab_size": 16, "blank_token_id": 15},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
    )  # fmt: skip
    processor = tf.Nemotron3_5TranscribeProcessor(
        tf.NemotronAsrStreamingFeatureExtractor(feature_size=32), tokenizer, byte_tokenizer([])
    )
    template = CHATML.replace("AUDIO", "<|audio|>")
    save(folder, tf.Nemotron3_5TranscribeForConditionalGeneration, config, processor, template)


def whisper(folder: Path) -> None:
    """An encoder-decoder: prompted by its start tokens alone."""
    bytes_only = byte_tokenizer([]).get_vocab()
    tokenizer = tf.WhisperTokenizer(vocab=bytes_only, merges=[])
    starts = ["<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": starts})
    config = tf.WhisperConfig(
        **WHISPER, decoder_layers=3, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=len(tokenizer),
        max_target_positions=32, decoder_start_token_id=tokenizer.convert_tokens_to_ids(starts[0]), pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    save(folder, tf.WhisperForConditionalGeneration, config, tf.WhisperProcessor(mel(), tokenizer))
