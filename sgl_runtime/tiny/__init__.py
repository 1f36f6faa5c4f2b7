"""The trained tiny pair: two InternVL-architecture VLMs small enough to ship, and the scenes they were trained on."""
