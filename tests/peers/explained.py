"""Tests of the peers that a split model fails for a reason that is no defect, by name."""

EXPLAINED = {
    "test_load_save_without_tied_weights": "the test opens model.safetensors; a part has no such "
    "file, so that `from_pretrained` does not take it for a model",
    "test_model_weights_reload_no_missing_tied_weights": "the test replaces model.safetensors, "
    "which is not the file that a part is loaded from",
    "test_all_tensors_are_parameter_or_buffer": (
        "a part refers to the modules of the other part on the meta device, for their attributes"
    ),
    "test_sliding_window_mask": "the test reads the attentions of all blocks; those of the trunk's "
    "are None",
    "test_eager_matches_batched_and_grouped_inference": "the test counts calls in this "
    "process, and `set_experts_implementation` of the client leaves the trunk's blocks their own",
}
