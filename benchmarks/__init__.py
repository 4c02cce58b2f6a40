"""How fast and how lean the losses are beside their peers: one file per chapter, one harness for all."""
