"""Pages and bytes: page layout, pool memory, the hand-off protocol and its transports."""
