"""FalconQ's HTTP surface as a gateway in front of a cluster. See docs/falconq.md."""
