//! Compiles the contracts without a system protoc, and derives the method table from their options.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../..");
    let (own, third_party) = (root.join("proto"), root.join("third_party/proto"));
    println!("cargo:rerun-if-changed={}", own.display());
    println!("cargo:rerun-if-changed={}", third_party.display());

    let mut files = Vec::new();
    collect(&own, &mut files)?;
    files.sort();
    let mut compiler = protox::Compiler::new([&own, &third_party])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files(&files)?;

    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptor_set.bin"), compiler.encode_file_descriptor_set())?;
    fs::write(out.join("methods.rs"), methods(&compiler.descriptor_pool())?)?;
    tonic_prost_build::configure()
        .generate_default_stubs(true)
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}

/// The table of methods with the permission that each one's contract states; a method without one ends the build.
fn methods(pool: &prost_reflect::DescriptorPool) -> Result<String, Box<dyn Error>> {
    let permission = pool
        .get_extension_by_name("aeterna.common.v1.permission")
        .ok_or("no extension aeterna.common.v1.permission")?;
    let mut rows = Vec::new();
    for method in pool.services().flat_map(|s| s.methods().collect::<Vec<_>>()) {
        let options = method.options();
        let number = options.get_extension(&permission).as_enum_number().unwrap_or(0);
        if number == 0 {
            return Err(format!("{} has no option (aeterna.common.v1.permission)", method.full_name()).into());
        }
        let read_only = options
            .get_field_by_name("idempotency_level")
            .and_then(|level| level.as_enum_number())
            .is_some_and(|level| level == 1);
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        rows.push((
            path,
            number,
            read_only,
            method.is_client_streaming(),
            method.is_server_streaming(),
        ));
    }
    rows.sort();
    let mut text = String::from("&[\n");
    for (path, number, read_only, client, server) in rows {
        writeln!(
            text,
            "    Method {{ path: {path:?}, permission: permission({number}), read_only: {read_only}, \
             client_streaming: {client}, server_streaming: {server} }},"
        )?;
    }
    text.push(']');
    Ok(text)
}
