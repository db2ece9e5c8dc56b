"""The keywords that x-transformers (2.31) has and this library does not have yet, so that an error can say so.

A name here is a fact about another library, kept only for messages; nothing is configured from it.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS = _names(
    """
    adaptive_condition_mlp adaptive_condition_mlp_expansion add_value_residual alibi_num_heads
    attn_aggregated_residual_kwargs attn_aggregated_residuals cross_attend cross_attn_tokens_dropout
    cross_residual_attn custom_layers depth_scale_residual dim_condition disable_abs_pos_emb dynamic_pos_bias
    dynamic_pos_bias_log_distance dynamic_pos_bias_mlp_depth dynamic_pos_bias_norm dynamic_tanh_init_alpha
    gate_residual gated_multi_residual hyper_conn_sinkhorn_iters integrate_layers layer_dropout
    layer_integrate_use_softmax layers_execute_order layerscale_init_value learned_reinject_input_gate
    learned_value_residual_mix macaron mv_split_residual num_residual_streams only_attn only_cross orthog_residual
    par_ratio polar_bias_uniform_init polar_pos_emb pre_and_post_norm pre_norm pre_norm_has_final_norm
    qkv_receive_diff_residuals reinject_input rel_pos_bias rel_pos_kwargs rel_pos_max_distance rel_pos_num_buckets
    residual_attn residual_fn_kwargs rotary_xpos rotary_xpos_scale_base rotate_num_heads sandwich_coef sandwich_norm
    scale_residual scale_residual_constant shift_tokens softclamp_output softclamp_output_value unet_skips
    use_adaptive_layernorm use_adaptive_layerscale use_adaptive_rmsnorm use_derf use_dynamic_tanh use_layerscale
    use_scalenorm use_simple_rmsnorm verbose weight_tie_layers zero_init_branch_output
    """
)

ATTENTION = _names(
    """
    add_zero_kv attend_sdp_kwargs cog_signed cope_max_pos cope_soft_onehot_pos cope_talking_heads custom_attn_fn
    data_dependent_alibi data_dependent_alibi_kwargs data_dependent_alibi_per_row
    data_dependent_alibi_per_row_dim_head dim_context dim_latent_kv dim_latent_q dim_out flash_pack_seq gate_value_heads
    gate_values gate_values_headwise gate_values_rank gumbel_softmax gumbel_softmax_hard gumbel_softmax_temp hard
    head_learned_sink head_scale hybrid_fold_axial_dim hybrid_learned_mix hybrid_mask_kwarg hybrid_module
    inverted_attention k_rmsnorm l2_distance laser laser_softclamp_value latent_rope_subheads logit_softclamp_value
    low_rank_silu_gates max_attend_past on_attn onnxable orthog_projected_values orthog_projected_values_per_head
    output_gate output_gate_headwise output_gate_rank post_talking_heads pre_scale_post_talking_heads
    pre_talking_heads project_out qk_norm_dim_scale qk_norm_groups rel_proj_max_dist rel_proj_num_distance_basis
    selective sigmoid softclamp_logits sparse_topk sparse_topk_straight_through sublayer_dropout swiglu_values
    use_cope use_latent_kv use_latent_q use_rel_proj_pos_bias value_dim_head value_rmsnorm zero_init_output
    """
)

FEED_FORWARD = _names(
    """
    custom_activation glu_gate_softclamp_value glu_mult_bias glu_softclamp glu_up_softclamp_value post_act_ln
    softclamp_value solu sublayer_dropout zero_init_output
    """
)

WRAPPER = _names(
    """
    add_continuous_pred_head attn_pool attn_pool_depth attn_z_loss_weight average_pool_embed dim_pooled_tokens emb_dim
    emb_frac_gradient embed_num_tokens ff_deep_embed input_not_include_cache l2norm_embed logits_dim looped
    max_looped_steps max_mem_len memory_tokens_interspersed_every mixture_of_softmax mixture_of_softmax_k
    num_cls_tokens num_output_heads num_pooled_tokens post_emb_norm recycling return_only_embed scaled_sinu_pos_emb
    shift_mem_down sigsoftmax_logits squeeze_out_last_dim to_logits token_emb train_max_recycle_steps use_cls_token
    """
)

LAYERS_CALL = _names(
    """
    additional_kv_mask attn_bias cache_age condition context context_mask context_pos cross_attn_kv_residuals
    deep_embeds_and_ids detach_additional_kv flash_pack_seq_context_kwargs flash_pack_seq_kwargs in_attn_cond
    input_not_include_cache layers_execute_order mem_masks mems polar_pos_emb repeat_blocks return_gumbel_log_probs
    return_hiddens rotary_pos_emb route_additional_kv_to_top self_attn_additional_kv self_attn_kv_mask
    self_attn_kv_residuals seq_pos_offset seq_start_pos transform_block_inputs
    """
)

WRAPPER_CALL = LAYERS_CALL | _names(
    """
    attn_z_loss_weight detach_mems embed_ids excise_prepend_embeds looped_exit_prob_threshold looped_inference
    looped_pred_all_logits looped_steps max_looped_steps prepend_embeds prepend_mask recycle_steps return_attn
    return_attn_z_loss return_embeddings_and_intermediates return_intermediates return_logit_entropies
    return_logits_and_embeddings return_mems return_next_embed_pred sum_embeds to_logits_kwargs token_emb_kwargs
    transform_token_embeds
    """
)

AUTOREGRESSIVE = _names(
    """
    add_attn_z_loss looped_exit_loss_weight looped_loss_slope looped_loss_threshold_exit mask_prob
    next_embed_loss_weight
    """
)

LOSS = WRAPPER_CALL | _names("lens return_outputs")

GENERATE = WRAPPER_CALL | _names(
    """
    amateur_model contrastive_decode_kwargs filter_kwargs filter_thres prompt_lens restrict_to_max_seq_len
    """
)

# what to write here instead, where there is something
INSTEAD = {
    "attn_max_attend_past": "pass the mask `window(size)` in the call; size counts the query's own position",
    "attn_sparse_topk": "a sparse pattern is a mask here, such as `window(256) | strided(64)`",
    "filter_kwargs": "pass top_k=, top_p= or min_p= themselves",
    "filter_thres": "pass top_k=, the number of tokens, or top_p=, the share of probability",
    "lens": "pass the mask `padding(lengths=lens)`",
    "max_mem_len": "keep a KVCache",
    "mems": "keep a KVCache and pass it as cache=",
    "prompt_lens": "pass a list of prompts, each [n]",
    "return_mems": "keep a KVCache and pass it as cache=",
    "self_attn_kv_mask": "pass the mask `keys(flags)`",
    "seq_start_pos": "pass the mask `everything.padded(starts)`",
}
