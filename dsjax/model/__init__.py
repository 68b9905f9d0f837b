"""The transformer as pure jax functions over paged KV."""
