//! Settings as flags: `--key value` for any setting, and `--config FILE`.

use aeterna_config::{Setting, Sources};
use clap::{Arg, ArgMatches, Command};

/// Short names of the flags that people type most.
const ALIASES: [(&str, &str); 2] = [("server.listen", "listen"), ("server.data_dir", "data-dir")];

/// Adds a flag for the configuration file and one per setting, so that `--help` lists them.
pub fn with_settings(command: Command, tables: &[&[Setting]]) -> Command {
    let file = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .help("Configuration file (TOML); also AETERNA_CONFIG")
        .help_heading("Settings");
    let mut command = command.arg(file);
    for setting in tables.iter().copied().flatten() {
        let arg = |key: &'static str, help: String| {
            Arg::new(key)
                .long(key)
                .value_name("VALUE")
                .allow_hyphen_values(true)
                .help(help)
                .help_heading("Settings")
        };
        let default = match setting.default {
            "" => String::new(),
            default => format!(" [default: {default}]"),
        };
        let mut flag = arg(setting.key, format!("{}{default}", setting.help));
        if let Some((_, alias)) = ALIASES.iter().find(|(key, _)| *key == setting.key) {
            flag = flag.visible_alias(*alias);
        }
        command = command.arg(flag);
        if let Some(key) = setting.file_key() {
            command = command.arg(arg(key, format!("File that holds `{}`", setting.key)));
        }
    }
    command
}

/// The sources of a process's configuration: the file, the environment, and the flags of [`with_settings`].
pub fn sources(matches: &ArgMatches, tables: &[&[Setting]]) -> Sources {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let named = environment.iter().find(|(name, _)| name == "AETERNA_CONFIG");
    let file = matches.get_one::<String>("config").or(named.map(|(_, value)| value));
    let keys = tables
        .iter()
        .copied()
        .flatten()
        .flat_map(|setting| [Some(setting.key), setting.file_key()].into_iter().flatten());
    let flags = keys.filter_map(|key| Some((key.to_owned(), matches.get_one::<String>(key)?.clone())));
    Sources {
        file: file.map(Into::into),
        flags: flags.collect(),
        environment,
    }
}
