"""`fusebn bench --device cuda`: the same questions, asked of a GPU.

One subject a file: `clock` how long a call takes there, `chip` what the device can do at best and
`probes` the kernels that find out, `traffic` the bytes that a verb must move, `tensors` a case's
data on the device, `contestants` who is measured, `race` the measuring, `training` ResNet-50;
`findings` the JSON, `goals` what was to be reached, `tables` what is printed, `command` the run.
"""
