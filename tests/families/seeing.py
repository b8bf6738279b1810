"""Families that also see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers as tf

from calm_pl.backbone.random_checkpoint import CHATML, byte_tokenizer
from tests.families.base import NEMOTRON_TEXT, QWEN2, VISION, WHISPER, mel, save


def omni_tokenizer() -> Any:
    return byte_tokenizer(
        ["<|im_start|>"],
        image_token="<|IMAGE|>", audio_token="<|AUDIO|>", video_token="<|VIDEO|>",
        vision_bos_token="<|vision_bos|>", vision_eos_token="<|vision_eos|>",
        audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>",
    )  # fmt: skip


OMNI_TEMPLATE = CHATML.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>").replace(
    "{% elif", "{% elif c['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>{% elif"
)


def omni_tokens(tokenizer: Any, suffix: str) -> dict[str, int]:
    ids = {
        f"{name}_token_{suffix}": tokenizer.convert_tokens_to_ids(f"<|{name.upper()}|>")
        for name in ("image", "audio", "video")
    }
    ids["audio_start_token_id"] = tokenizer.convert_tokens_to_ids("<|audio_bos|>")
    return ids | {"vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_bos|>")}


def qwen25_omni(folder: Path) -> None:
    """The whole Omni, with talker and vocoder, as its hub repository holds it."""
    tokenizer = omni_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    thinker = {
        "audio_config": {**WHISPER, "n_window": 20, "output_dim": 32},
        "vision_config": {**VISION, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        "text_config": {"vocab_size": len(tokenizer), "rope_parameters": rope, **QWEN2},
        **omni_tokens(tokenizer, "index"),
    }
    talker = {"vocab_size": 64, "embedding_size": 32, "head_dim": 8, "rope_parameters": rope, **QWEN2}
    token2wav = {
        "dit_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 16,
            "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8], "enc_kernel_sizes": [3, 3, 3],
            "enc_dilations": [1, 1, 1], "enc_attention_channels": 4, "enc_res2net_scale": 2, "enc_se_channels": 4,
            "num_embeds": 8, "mel_dim": 8, "repeats": 1, "look_ahead_layers": [0], "look_backward_layers": [0],
        },
        "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 8, "resblock_kernel_sizes": [3],
                           "resblock_dilation_sizes": [[1, 3, 5]], "upsample_rates": [2], "upsample_kernel_sizes": [4]},
    }  # fmt: skip
    config = tf.Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker, token2wav_config=token2wav)
    processor = tf.Qwen2_5OmniProcessor(
        image_processor=tf.Qwen2VLImageProcessor(), video_processor=tf.Qwen2VLVideoProcessor(),
        feature_extractor=mel(), tokenizer=tokenizer,
    )  # fmt: skip
    save(folder, tf.Qwen2_5OmniForConditionalGeneration, config, processor, OMNI_TEMPLATE)
    content = json.loads((folder / "config.json").read_text())
    content["architectures"] = ["Qwen2_5OmniModel"]  # what the hub's config says; no such class exists
    (folder / "config.json").write_text(json.dumps(content))


def qwen3_omni(folder: Path) -> None:
    """Mixture of experts; without a talker."""
    tokenizer = omni_tokenizer()
    text = QWEN2 | {
        "vocab_size": len(tokenizer), "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
    }  # fmt: skip
    thinker = {
        "audio_config": WHISPER | {"n_window": 50, "n_window_infer": 100, "output_dim": 32,
                                   "downsample_hidden_size": 8},
        "vision_config": VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0],
                                   "num_position_embeddings": 16},
        "text_config": text,
        **omni_tokens(tokenizer, "id"),
    }  # fmt: skip
    config = tf.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    processor = tf.Qwen3OmniMoeProcessor(
        image_processor=tf.Qwen2VLImageProcessor(patch_size=16),
        video_processor=tf.Qwen2VLVideoProcessor(patch_size=16), feature_extractor=mel(), tokenizer=tokenizer,
    )  # fmt: skip
    save(folder, tf.Qwen3OmniMoeForConditionalGeneration, config, processor, OMNI_TEMPLATE)


def phi4(folder: Path) -> None:
    """Fused query, key and value projections."""
    tokenizer = byte_tokenizer(["<|im_start|>"], image_token="<|image|>", audio_token="<|audio|>")
    config = tf.Phi4MultimodalConfig(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=1, **QWEN2,
        original_max_position_embeddings=2048,
        audio_config={"hidden_size": 32, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2,
                      "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8,
                      "audio_token_id": tokenizer.audio_token_id},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "crop_size": 448, "image_size": 448, "image_token_id": tokenizer.image_token_id},
    )  # fmt: skip
    processor = tf.Phi4MultimodalProcessor(
        tf.Phi4MultimodalImageProcessor(), tf.Phi4MultimodalFeatureExtractor(), tokenizer
    )
    save(folder, tf.Phi4MultimodalForCausalLM, config, processor, PHI_TEMPLATE)


IMAGE_TEMPLATE = CHATML.replace("{% elif", "{% elif c['type'] == 'image' %}IMAGE{% elif")
PHI_TEMPLATE = IMAGE_TEMPLATE.replace("AUDIO", "<|audio|>").replace("IMAGE", "<|image|>")
GEMMA_TURN = "<start_of_turn>model\n"
GEMMA_TEMPLATE = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}<audio_soft_token>{% elif c['type'] == 'image' %}<image_soft_token>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma_tokenizer() -> Any:
    return byte_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
        audio_token="<audio_soft_token>", boa_token="<start_of_audio>", eoa_token="<end_of_audio>",
    )  # fmt: skip


def gemma_tokens(tokenizer: Any) -> dict[str, int]:
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("boi", "eoi", "image", "boa", "eoa", "audio")
    }


GEMMA_TEXT = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
}


def gemma3n(folder: Path) -> None:
    """Sliding-window layers, and last layers that share the keys and values of earlier ones."""
    tokenizer = gemma_tokenizer()
    size = len(tokenizer) + 256  # behind the text lie the ids of vision and audio
    config = tf.Gemma3nConfig(
        text_config={**GEMMA_TEXT, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "vocab_size": size,
                     "vocab_size_per_layer_input": len(tokenizer), "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.0] * 5,
                     "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
                                     "full_attention"]},
        audio_config={"vocab_size": 128, "vocab_offset": len(tokenizer) + 128, "hidden_size": 32,
                      "conf_num_attention_heads": 2, "conf_num_hidden_layers": 2, "sscp_conv_channel_size": [8, 4]},
        vision_config={"vocab_size": 128, "vocab_offset": len(tokenizer), "hidden_size": 2048,
                       "model_args": {"channel_multiplier": 0.05}},
        **gemma_tokens(tokenizer),
    )  # fmt: skip
    processor = tf.Gemma3nProcessor(tf.Gemma3nAudioFeatureExtractor(), tf.SiglipImageProcessor(), tokenizer)
    save(folder, tf.Gemma3nForConditionalGeneration, config, processor, GEMMA_TEMPLATE)


def gemma4(folder: Path) -> None:
    """Wider heads in full-attention layers than in sliding ones; keys and values shared."""
    tokenizer = gemma_tokenizer()
    config = tf.Gemma4Config(
        text_config={**GEMMA_TEXT, "num_hidden_layers": 4, "num_kv_shared_layers": 1, "global_head_dim": 32,
                     "vocab_size": len(tokenizer) + 1, "vocab_size_per_layer_input": len(tokenizer) + 1,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
        audio_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 32,
                      "subsampling_conv_channels": [128, 4]},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "head_dim": 16},
        **{name: value for name, value in gemma_tokens(tokenizer).items() if not name.startswith("eoa")},
        eoa_token_index=tokenizer.eoa_token_id,
        video_token_id=len(tokenizer),
    )  # fmt: skip
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(), tokenizer, tf.Gemma4VideoProcessor()
    )
    save(folder, tf.Gemma4ForConditionalGeneration, config, processor, GEMMA_TEMPLATE)


def gemma4_unified(folder: Path) -> None:
    """No encoders: pieces of sound and pictures go straight into the decoder."""
    tokenizer = gemma_tokenizer()
    config = tf.Gemma4UnifiedConfig(
        text_config={**{name: value for name, value in GEMMA_TEXT.items() if name != "hidden_size_per_layer_input"},
                     "num_hidden_layers": 4, "global_head_dim": 32, "vocab_size": len(tokenizer) + 1,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
        audio_config={},
        vision_config={"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 64},
        **{name: value for name, value in gemma_tokens(tokenizer).items() if not name.startswith("eoa")},
        eoa_token_index=tokenizer.eoa_token_id,
        video_token_id=len(tokenizer),
    )  # fmt: skip
    processor = tf.Gemma4UnifiedProcessor(
        tf.Gemma4UnifiedAudioFeatureExtractor(), tf.Gemma4UnifiedImageProcessor(), tokenizer,
        tf.Gemma4UnifiedVideoProcessor(),
    )  # fmt: skip
    save(folder, tf.Gemma4UnifiedForConditionalGeneration, config, processor, GEMMA_TEMPLATE)


def muse_spark(folder: Path) -> None:
    """Hears raw waveforms by convolutions, at 24 kHz; sliding windows, a mixture of experts."""
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|image_start|>", "<|image_end|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>",
         "<|soft_audio_start|>", "<|soft_audio_end|>"],
        image_token="<|patch|>", audio_token="<|audio|>", video_token="<|video|>",
    )  # fmt: skip
    config = tf.MuseSparkConfig(
        text_config={**QWEN2, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 16, "num_local_experts": 4,
                     "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                     "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_hidden_size": 16, "pad_token_id": 0,
                     "bos_token_id": 1, "eos_token_id": 1},
        audio_config={"patch_sizes": [16, 6, 5, 4], "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                      "out_hidden_size": 32},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        out_hidden_size=128, projector_hidden_size=32,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )  # fmt: skip
    processor = tf.MuseSparkProcessor(
        tf.MuseGlimmerImageProcessor(), tf.MuseGlimmerVideoProcessor(), tokenizer, tf.MuseSparkFeatureExtractor()
    )
    template = IMAGE_TEMPLATE.replace("AUDIO", "<|audio|>").replace("IMAGE", "<|patch|>")
    save(folder, tf.MuseSparkForConditionalGeneration, config, processor, template)


def inkling(folder: Path) -> None:
    """Sound as quantised mel frames, which are embedded like tokens; convolutions inside the decoder's layers."""
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|content_image|>", "<|content_audio_input|>"],
        image_token="<|unused_200054|>", audio_token="<|unused_200053|>",
    )  # fmt: skip
    config = tf.InklingConfig(
        text_config={**QWEN2, "vocab_size": len(tokenizer), "head_dim": 8, "swa_num_attention_heads": 4,
                     "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 16, "d_rel": 4,
                     "rel_extent": 32, "local_layer_ids": [1], "moe_intermediate_size": 16, "n_routed_experts": 4,
                     "num_experts_per_tok": 2, "logits_mup_width_multiplier": 1.0,
                     "mlp_layer_types": ["dense", "sparse", "sparse"]},
        audio_config={"mel_vocab_size": 16, "text_hidden_size": 32},
        vision_config={"text_hidden_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        image_token_id=tokenizer.image_token_id, audio_token_id=tokenizer.audio_token_id,
        image_bos_token_id=tokenizer.convert_tokens_to_ids("<|content_image|>"),
        audio_bos_token_id=tokenizer.convert_tokens_to_ids("<|content_audio_input|>"),
    )  # fmt: skip
    processor = tf.InklingProcessor(tf.InklingFeatureExtractor(), tf.InklingImageProcessor(), tokenizer)
    template = IMAGE_TEMPLATE.replace("AUDIO", "<|unused_200053|>").replace("IMAGE", "<|unused_200054|>")
    save(folder, tf.InklingForConditionalGeneration, config, processor, template)


def dots3_note(folder: Path) -> None:
    """Latent attention, in which few keys are looked up (indexed) or a window slides; a mixture of experts."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"])
    config = tf.Dots3NoteConfig(
        text_config={**QWEN2, "num_key_value_heads": 4, "vocab_size": len(tokenizer), "moe_intermediate_size": 16,
                     "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_experts_intermediate_size": 16,
                     "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                     "v_head_dim": 8, "head_dim": 16, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 16,
                     "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
                     "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
                     "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
                     "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        audio_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "feature_size": 32, "downsample_hidden_size": 8, "adapter_input_size": 32,
                      "adapter_out_dim": 32},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "moe_intermediate_size": 16, "mlp_layer_types": ["dense"], "adapter_in_dim": 32,
                       "adapter_out_dim": 32},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in
           (("image", "<|imgpad|>"), ("video", "<|video_pad|>"), ("audio", "<|audio_comp_pad|>"))},
    )  # fmt: skip
    processor = tf.Dots3NoteProcessor(
        tf.Qwen2VLImageProcessor(temporal_patch_size=1), tokenizer, tf.Qwen3VLVideoProcessor(patch_size=14),
        tf.Dots3NoteFeatureExtractor(feature_size=32, chunk_length=2),
    )  # fmt: skip
    template = IMAGE_TEMPLATE.replace("AUDIO", "<|audio_comp_pad|>").replace("IMAGE", "<|imgpad|>")
    save(folder, tf.Dots3NoteForConditionalGeneration, config, processor, template)


def nemotron_omni(folder: Path) -> None:
    """Few of the decoder's layers attend; the others are state-space layers and experts."""
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<img>", "</img>", "<so_start>", "<so_end>"],
        image_token="<image>", video_token="<video>", audio_token="<so_embedding>",
    )  # fmt: skip
    config = tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config={**NEMOTRON_TEXT, "vocab_size": len(tokenizer)},
        audio_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                      "num_mel_bins": 32, "subsampling_conv_channels": 8, "projection_hidden_size": 32,
                      "projection_bias": False, "layerdrop": 0.0},
        vision_config={"model_type": "radio", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "max_img_size": 64, "video_temporal_patch_size": 2},
        projector_hidden_size=32, vision_hidden_size=32, image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id, audio_token_id=tokenizer.audio_token_id,
    )  # fmt: skip
    processor = tf.NemotronH_Omni_Reasoning_V3Processor(
        tf.NemotronH_Omni_Reasoning_V3ImageProcessor(min_num_patches=4, max_num_patches=16),
        tf.NemotronH_Omni_Reasoning_V3VideoProcessor(), tokenizer, tf.ParakeetFeatureExtractor(feature_size=32),
    )  # fmt: skip
    template = IMAGE_TEMPLATE.replace("AUDIO", "<so_embedding>").replace("IMAGE", "<image>")
    save(folder, tf.NemotronH_Omni_Reasoning_V3, config, processor, template)


def apertus(folder: Path) -> None:
    """Sound and pictures as codes, which convolutions make and which are embedded like tokens."""
    tokenizer = byte_tokenizer(
        ["<|im_start|>"],
        image_token="<|image|>", boi_token="<|img_start|>", eoi_token="<|img_end|>", image_wrapper_token="<|img_wrap|>",
        eol_token="<|img_end_of_row|>", audio_token="<|audio|>", boa_token="<|audio_start|>", eoa_token="<|audio_end|>",
    )  # fmt: skip
    codes, text = 64, len(tokenizer)  # the ids of pictures lie behind the text, those of sound behind them
    config = tf.Apertus1p5Config(
        text_config={**QWEN2, "vocab_size": text + 2 * codes, "output_vocab_size": text, "pad_token_id": 0,
                     "bos_token_id": 1, "eos_token_id": 1},
        audio_config={"num_filters": 4, "num_lstm_layers": 1, "hidden_size": 32, "codebook_dim": 32,
                      "codebook_size": codes},
        vision_config={"codebook_size": codes, "embed_dim": 8, "latent_channels": 8, "base_channels": 32,
                       "num_res_blocks": 1},
        image_token_id=tokenizer.image_token_id, audio_token_id=tokenizer.audio_token_id,
        image_token_offset=text, audio_token_offset=text + codes,
    )  # fmt: skip
    processor = tf.Apertus1p5Processor(
        tf.Apertus1p5ImageProcessor(), tf.WavTokenizerFeatureExtractor(normalize_audio=True), tokenizer
    )
    template = IMAGE_TEMPLATE.replace("AUDIO", "<|audio|>").replace("IMAGE", "<|image|>")
    save(folder, tf.Apertus1p5ForConditionalGeneration, config, processor, template)
