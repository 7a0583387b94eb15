"""What a config becomes: mesh, data, model, numbers, compiled programs."""
