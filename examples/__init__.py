"""Programs that train with the losses on several processes; each says at its top how it is started."""
