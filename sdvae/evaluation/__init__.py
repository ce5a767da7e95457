"""How good reconstructions are: metrics, and what reports them."""
