#![no_main]

farshore_fuzz::target!(link::fuzz::certificate_request);
