"""Private text in, prepared folders out, and the stream of blocks that training reads from them."""
