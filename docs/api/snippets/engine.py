import numpy as np

from rlsd.engine import Engine, Job, Params
from rlsd.models.fashion import PATH

params = Params(steps=40, rho=0.1, gamma=5, lr_x=0.1, lr_z=0.05)
with Engine(PATH / "bundle") as engine:
    image = np.full((1, *engine.image_shape), -1, np.float32)
    image[:, :, 8:24, 10:22] = 0.5
    mask = np.ones(engine.image_shape, np.float32)
    mask[:, :16] = 0  # the upper half is not seen
    y = engine.measure("inpainting", image, mask=mask)[0]
    job = Job(y, "inpainting", {"mask": mask}, particles=3, seed=7, params=params)

    handle = engine.submit(job)
    while engine.tick():  # other jobs may be submitted here; they join the next tick
        if handle.info().step == 20:
            snapshot = handle.snapshot()
    result = handle.result()

resumed = Job(y, "inpainting", {"mask": mask}, particles=3, seed=7, params=params, snapshot=snapshot)
with Engine(PATH / "bundle", threads=1) as engine:
    (again,) = engine.reconstruct([resumed])
print(again.particles.shape, np.array_equal(again.particles, result.particles))  # (3, 1, 32, 32) True
