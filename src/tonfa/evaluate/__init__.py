"""How near a transformer comes to another one in the same pipeline: velocities, pictures, layers, adherence."""
