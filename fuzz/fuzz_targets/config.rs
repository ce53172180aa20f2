//! Arbitrary text as a configuration: nothing panics, and nothing that is printed holds a secret.
#![no_main]

use restcast::config::{Config, FileError, Sources};

const ENV_SECRET: &str = "ENV-SECRET-0123456789abcdef-0123456789abcdef-0123456789abcdef-0123";
const FILE_SECRET: &str = "FILE-SECRET-0123456789abcdef-0123456789abcdef-0123456789abcdef-012";

/// Every variable and every file but one holds a secret.
struct World;

impl Sources for World {
    fn env(&self, name: &str) -> Option<Vec<u8>> {
        (name != "NOPE").then(|| ENV_SECRET.into())
    }

    fn file(&self, path: &str, _: usize) -> Result<Vec<u8>, FileError> {
        match path {
            "nope" => Err(FileError::Missing),
            "ca.pem" => Ok(format!("-----BEGIN CERTIFICATE-----\n{FILE_SECRET}\n").into_bytes()),
            _ => Ok(FILE_SECRET.into()),
        }
    }
}

libfuzzer_sys::fuzz_target!(|text: &str| {
    // Text that spells the secret out itself may show it: as an unknown key, for one.
    if text.contains("-SECRET-") {
        return;
    }
    match Config::parse(text, &World) {
        Ok((config, warnings)) => {
            let shown = config.masked_toml();
            assert_hidden(&shown);
            assert_hidden(&format!("{warnings:?}{}", warnings.iter().map(ToString::to_string).collect::<String>()));
            for stream in &config.streams {
                let filled = stream.url.fill(&|_| Some("a/../b"), &|_| Some("?#"));
                assert!(filled.is_ok(), "ordinary values fill every template");
            }
            // What is shown is TOML, and the same with nothing hidden in it.
            let filled =
                shown.replace("secret = \"***\"", "secret = \"env:X\"").replace("\nkey = \"***\"", "\nkey = \"env:X\"");
            if let Err(errors) = Config::parse(&filled, &World) {
                panic!("what is shown is no configuration: {errors:?}\n{shown}");
            }
        }
        Err(errors) => {
            assert!(!errors.is_empty(), "a refusal says why");
            assert_hidden(&format!("{errors:?}{}", errors.iter().map(ToString::to_string).collect::<String>()));
        }
    }
});

fn assert_hidden(said: &str) {
    assert!(!said.contains(ENV_SECRET) && !said.contains(FILE_SECRET), "a secret is shown: {said}");
}
