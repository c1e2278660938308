#![no_main]

farshore_fuzz::target!(link::fuzz::link_frames);
