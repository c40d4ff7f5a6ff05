//! Pages that are made from the code stay true to it. `make docs-update` writes them anew.

use std::fmt::Write as _;
use std::path::Path;

fn check(name: &str, wanted: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, wanted).expect("the page can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "{name} is not what the code says; run `make docs-update` and read the change"
    );
}

#[test]
fn the_page_of_errors_lists_every_reason() {
    let mut page = String::from(
        "# Errors\n\n<!-- Made from libs/error/src/reason.rs by `make docs-update`. -->\n\nEvery error is a canonical gRPC \
         status with `google.rpc.ErrorInfo{reason, domain: \"aeterna\"}`. Bad input adds `google.rpc.BadRequest` with every\n\
         field at fault, and `google.rpc.RetryInfo` says when a retry helps. The `x-request-id` header of each answer finds \
         the call in the log:\nby default refused tokens and failures that have a cause, every call with \
         `log.filter = \"info,aeterna_rpc=debug\"`.\n\n| reason | code | what happened | what to do | example |\n|---|---|---|---|---|\n",
    );
    for row in aeterna_error::REASONS {
        let _ = writeln!(
            page,
            "| `{}` | {:?} | {} | {} | {} |",
            row.name, row.code, row.meaning, row.remedy, row.example
        );
    }
    check("docs/errors.md", &page);
}

#[test]
fn the_page_of_settings_lists_every_setting() {
    let mut page = String::from(
        "# Configuration\n\n<!-- Made from the settings tables in the code by `make docs-update`. -->\n\nDefaults < file \
         (`--config FILE` or `AETERNA_CONFIG`, TOML) < environment < flags (`--key value`). Unknown keys are refused, and all\n\
         problems are reported together. A secret prints as stars, and `<key>_file` reads it from a file.\n\n\
         | key | environment | default | what it does |\n|---|---|---|---|\n",
    );
    for setting in [
        aeterna_rpc::HOST_SETTINGS,
        aeterna_rpc::LIMIT_SETTINGS,
        aeterna_embedding::SETTINGS,
        aeterna_memory::SETTINGS,
    ]
    .concat()
    {
        let default = if setting.default.is_empty() {
            String::new()
        } else {
            format!("`{}`", setting.default)
        };
        let _ = writeln!(
            page,
            "| `{}` | `{}` | {default} | {} |",
            setting.key,
            setting.variable(),
            setting.help
        );
    }
    check("docs/configuration.md", &page);
}
